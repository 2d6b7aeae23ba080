"""What a call must be, looked at once before anything is launched or written."""
