"""`/stream`: live video over a WebSocket, a frame a message."""
