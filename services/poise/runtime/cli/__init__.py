"""What command-line programs share: exit statuses, signals, closed pipes, the console."""
