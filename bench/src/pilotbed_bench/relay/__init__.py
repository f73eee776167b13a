"""The relay beside other ways through a firewall."""
