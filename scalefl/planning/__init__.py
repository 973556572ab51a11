"""What a level needs before anything is trained, and which level each client can hold."""
