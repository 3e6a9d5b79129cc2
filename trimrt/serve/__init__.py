"""`trimrt serve`: one process that serves, or several under a supervisor."""
