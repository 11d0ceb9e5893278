"""Result containers under upstream's import path."""
