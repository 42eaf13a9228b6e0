"""From a recipe to a running job: command line, script, run folder, the check before it, the report after it."""
