"""`trimrt doctor`: what this machine has, and what would keep `trimrt serve` from serving."""
