"""The experiment's model and scenarios, and where their time goes: Workload -> Hotspots."""
