"""The tables of the two databases."""

from __future__ import annotations

from sqlalchemy import ForeignKey
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column, validates


class Main(DeclarativeBase):
    """The tables of the shop itself."""


class Customer(Main):
    __tablename__ = "customers"

    id: Mapped[int] = mapped_column(primary_key=True)
    name: Mapped[str] = mapped_column(unique=True)

    @validates("name")
    def _has_a_name(self, _key: str, name: str) -> str:
        if not name:
            raise ValueError("a customer has a name")
        return name


class Order(Main):
    __tablename__ = "orders"

    id: Mapped[int] = mapped_column(primary_key=True)
    # Deferred: the database looks only at COMMIT whether there is such a customer.
    customer: Mapped[str] = mapped_column(ForeignKey("customers.name", deferrable=True, initially="DEFERRED"))
    item: Mapped[str]


class Letter(Main):
    __tablename__ = "letters"

    id: Mapped[int] = mapped_column(primary_key=True)
    to: Mapped[str]
    text: Mapped[str]


class Audit(DeclarativeBase):
    """The tables of the record that is kept of the shop."""


class Clerk(Audit):
    __tablename__ = "clerks"

    name: Mapped[str] = mapped_column(primary_key=True)


class Entry(Audit):
    __tablename__ = "entries"

    id: Mapped[int] = mapped_column(primary_key=True)
    reference: Mapped[str] = mapped_column(unique=True)
    clerk: Mapped[str] = mapped_column(ForeignKey(Clerk.name, deferrable=True, initially="DEFERRED"))
