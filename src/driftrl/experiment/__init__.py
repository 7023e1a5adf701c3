"""Many runs from one plan: what they are (`plan`), where each stands (`standing`), and the processes (`pool`)."""
