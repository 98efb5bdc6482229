"""Integrations: posteriors and networks in other libraries' terms. Each module needs its library; nothing else imports them."""
