"""Processes of a group: messages between them, sums over them, and the trainers (DDP, FSDP) that they run under."""
