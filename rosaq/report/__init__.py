"""What people see: tables for the terminal, and records of runs as JSON."""
