"""What goes into an llmapi package as it is: these files must not import trtbuild."""
