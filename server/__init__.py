"""What serves: batching, HTTP, gRPC and metrics. Never needs torch."""
