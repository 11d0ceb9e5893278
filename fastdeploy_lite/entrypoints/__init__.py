"""What a person or a program starts: the offline API, the HTTP server, the command line."""
