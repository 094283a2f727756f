"""What people see: live progress while a run goes on, tables when it is done. Builds renderables and lines, prints nothing."""
