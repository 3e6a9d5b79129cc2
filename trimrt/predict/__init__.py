"""`trimrt predict`: an engine's labels for many images at once, without a server."""
