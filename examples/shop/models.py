"""The tables of the two databases."""

from __future__ import annotations

from sqlalchemy import ForeignKey
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column, validates


class ShopBase(DeclarativeBase):
    """The base class of the tables in the shop database."""


class Customer(ShopBase):
    __tablename__ = "customers"

    id: Mapped[int] = mapped_column(primary_key=True)
    name: Mapped[str] = mapped_column(unique=True)

    @validates("name")
    def _validate_name(self, _key: str, name: str) -> str:
        if not name:
            raise ValueError("a customer must have a name")
        return name


class Order(ShopBase):
    __tablename__ = "orders"

    id: Mapped[int] = mapped_column(primary_key=True)
    # The constraint is deferred: the database checks only at COMMIT whether the customer exists.
    customer: Mapped[str] = mapped_column(ForeignKey("customers.name", deferrable=True, initially="DEFERRED"))
    item: Mapped[str]


class Letter(ShopBase):
    __tablename__ = "letters"

    id: Mapped[int] = mapped_column(primary_key=True)
    to: Mapped[str]
    text: Mapped[str]


class AuditBase(DeclarativeBase):
    """The base class of the tables in the audit database."""


class Clerk(AuditBase):
    __tablename__ = "clerks"

    name: Mapped[str] = mapped_column(primary_key=True)


class AuditEntry(AuditBase):
    __tablename__ = "entries"

    id: Mapped[int] = mapped_column(primary_key=True)
    reference: Mapped[str] = mapped_column(unique=True)
    clerk: Mapped[str] = mapped_column(ForeignKey(Clerk.name, deferrable=True, initially="DEFERRED"))
