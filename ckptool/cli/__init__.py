"""The command line: click, the streams, exit codes; one file for each command."""
