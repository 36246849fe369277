"""What people run: the command line and the demo. The core never imports these."""
