"""Measurements that decide: the libraries, the peers and the limit."""
