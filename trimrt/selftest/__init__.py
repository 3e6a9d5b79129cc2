"""`trimrt selftest`: does TrimRT work on this machine? Needs neither torch nor pytest."""
