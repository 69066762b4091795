"""How the authors of these models measured them, a runner for what no harness has, and a model for one."""
