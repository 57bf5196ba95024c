"""The trainer: a process of its own, started by name with a spec file; it never imports airflow."""
