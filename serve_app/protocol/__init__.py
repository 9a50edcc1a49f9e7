"""What travels over HTTP: request and response bodies, one file per protocol. No engine calls."""
