"""What a configuration does on this machine: real training steps, without Ray, timed and taken apart."""
