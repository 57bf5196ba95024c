"""What is compared: each module is a process that trains rounds of the same rows when it is told to."""
