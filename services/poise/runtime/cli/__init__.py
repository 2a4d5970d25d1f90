"""Shared by command-line programs: exit statuses, signals, closed pipes, the console."""
