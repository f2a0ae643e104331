//! A device's state as plain, self-describing data.

use serde::{Serialize, de::DeserializeOwned};

/// Plain data: maps by field name, so that a file says what it holds.
pub type Value = ciborium::Value;

/// Why a state can't be saved or taken.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct StateError(pub String);

/// Encodes a state.
///
/// # Errors
/// What serde can't encode; with plain structs this does not happen.
pub fn to_value<T: Serialize>(state: &T) -> Result<Value, StateError> {
    Value::serialized(state).map_err(|e| StateError(format!("the state can't be encoded: {e}")))
}

/// Decodes a state. The caller then checks what the types don't (indices, lengths, ranges).
///
/// # Errors
/// A field is missing, unknown or of the wrong type.
pub fn from_value<T: DeserializeOwned>(value: &Value) -> Result<T, StateError> {
    value.deserialized().map_err(|e| StateError(format!("the saved state does not fit this chip: {e}")))
}

/// Gives `Err` with a text unless `ok`: for `State::check`.
///
/// # Errors
/// When `ok` is false.
pub fn ensure(ok: bool, text: impl FnOnce() -> String) -> Result<(), StateError> {
    if ok { Ok(()) } else { Err(StateError(text())) }
}
