"""What every kind of executor must do: each test runs with all that are installed."""
