"""Load testing of a running server: `trimrt loadtest`. Nothing that serves imports this."""
