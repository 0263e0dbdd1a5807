"""What particular libraries need. Nothing here is imported unless the model comes from that library."""
