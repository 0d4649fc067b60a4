"""The engine against a real metadata server, real donors and real workers, each in a process of its own."""
