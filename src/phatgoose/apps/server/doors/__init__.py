"""The doors: who may come in, how much they may send, and for how long.

bodies.py        What comes in: only from those who are let in, only JSON, in time, and never too mu
connections.py   Connections: so many at most, none that sends or reads its part for ever
waiting_room.py  Who is let in: by the name that was asked for, by the page that asks, and by key
"""
