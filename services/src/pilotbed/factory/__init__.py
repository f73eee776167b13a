"""The factory: turns the requests of trusted frontends into pilots queued at computing elements."""
