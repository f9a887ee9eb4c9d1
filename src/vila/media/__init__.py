"""Pictures and clips: opening them safely, fetching them from a URL, and turning them into pixels."""
