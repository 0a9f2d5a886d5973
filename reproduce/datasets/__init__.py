"""The real data of the experiments."""

from reproduce.datasets.adult import Adult, adult
from reproduce.datasets.digits import Digits, mnist, ones_and_sevens
from reproduce.datasets.hospital import Hospital, hospital
from reproduce.datasets.mail import Mail, mail

__all__ = [
    "Adult",
    "Digits",
    "Hospital",
    "Mail",
    "adult",
    "hospital",
    "mail",
    "mnist",
    "ones_and_sevens",
]
