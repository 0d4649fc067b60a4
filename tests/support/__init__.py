"""What several tests share: child processes, servers, devices."""
