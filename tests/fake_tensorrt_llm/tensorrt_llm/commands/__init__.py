"""As upstream has it: the commands of the console scripts."""
