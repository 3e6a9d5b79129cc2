"""`trimrt demo`: from the shipped student to a served, measured prediction."""
