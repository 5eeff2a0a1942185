"""Load tests of a running service: realistic requests, a closed loop (Locust), an open loop, objectives, a report."""
