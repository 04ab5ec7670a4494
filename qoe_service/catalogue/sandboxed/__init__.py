"""Programs that run only inside the sandbox. They know neither Django nor the service, and trust no byte they read."""
