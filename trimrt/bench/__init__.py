"""`trimrt bench`: engine packages timed side by side, and tuned to this machine."""
