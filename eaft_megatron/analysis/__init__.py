"""What a frozen model thinks of prepared data: scores beside it, and the entropy-probability landscape they draw."""
