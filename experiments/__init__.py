"""The evidence: what the README and docs/results.md say about accuracy and size, made by these modules."""
