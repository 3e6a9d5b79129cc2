"""`trimrt watch`: the labels of live video, or of a film."""
