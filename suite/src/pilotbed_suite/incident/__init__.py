"""pilotbed-incident: who did this, block him everywhere, end what he runs, keep the logs; and take it back.

It runs where the playbooks do, and reaches nodes as tests and walk do (`pilotbed_suite.reach`), so it lives beside them
and not in the product that nodes get. On the nodes it uses what operators have there: pilotbed-ban, pilotbed-trace,
voms-database, HTCondor's tools. ``found`` and ``record`` are without input and output but for the record's file.
"""
