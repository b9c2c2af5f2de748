"""The commands that users type, one module each. No command imports another."""
