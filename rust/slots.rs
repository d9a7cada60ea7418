//! Pairs of key and value in insertion order, for one or two keys in most cases.

/// Pairs of key and value, both of the type `T`.
///
/// A key is found by a scan, which is as fast as a hash map for up to sixteen keys.  One key, the most common number,
/// needs no allocation.  The type is two words wide.  A pair that is replaced or removed is returned and never dropped
/// here: the caller decides when a destructor may run.
#[derive(Clone)]
pub enum Slots<T> {
    One((T, T)),
    // In a box, so that it is one word wide beside the null pointer that distinguishes it from `One`.
    #[expect(clippy::box_collection)]
    Other(Option<Box<Vec<(T, T)>>>),
}

impl<T> Slots<T> {
    pub const fn new() -> Self {
        Self::Other(None)
    }

    #[inline(always)]
    fn as_slice(&self) -> &[(T, T)] {
        match self {
            Self::One(pair) => std::slice::from_ref(pair),
            Self::Other(Some(pairs)) => pairs,
            Self::Other(None) => &[],
        }
    }

    fn as_mut_slice(&mut self) -> &mut [(T, T)] {
        match self {
            Self::One(pair) => std::slice::from_mut(pair),
            Self::Other(Some(pairs)) => pairs,
            Self::Other(None) => &mut [],
        }
    }

    pub fn len(&self) -> usize {
        self.as_slice().len()
    }

    pub fn iter(&self) -> impl Iterator<Item = &(T, T)> {
        self.as_slice().iter()
    }

    /// The value of the key for which `same` returns true.
    #[inline(always)]
    pub fn get(&self, same: impl Fn(&T) -> bool) -> Option<&T> {
        match self {
            Self::One((key, value)) => same(key).then_some(value),
            Self::Other(pairs) => pairs.as_ref()?.iter().find(|(key, _)| same(key)).map(|(_, value)| value),
        }
    }

    /// Set the value of `key`.  A pair that replaces another one keeps its position in the order.
    ///
    /// Returns the pair that was replaced.
    pub fn put(&mut self, key: T, value: T, same: impl Fn(&T) -> bool) -> Option<(T, T)> {
        let pair = (key, value);
        if let Some(old) = self.as_mut_slice().iter_mut().find(|(key, _)| same(key)) {
            return Some(std::mem::replace(old, pair));
        }
        *self = match self.take() {
            Self::Other(None) => Self::One(pair),
            Self::One(first) => Self::Other(Some(Box::new(vec![first, pair]))),
            Self::Other(Some(mut pairs)) => {
                pairs.push(pair);
                Self::Other(Some(pairs))
            }
        };
        None
    }

    /// Remove and return the pair of the key for which `same` returns true.
    pub fn pop(&mut self, same: impl Fn(&T) -> bool) -> Option<(T, T)> {
        let index = self.iter().position(|(key, _)| same(key))?;
        match self {
            Self::Other(Some(pairs)) => Some(pairs.remove(index)),
            _ => match self.take() {
                Self::One(pair) => Some(pair),
                Self::Other(_) => None,
            },
        }
    }

    /// Remove and return all pairs.
    pub fn take(&mut self) -> Self {
        std::mem::replace(self, Self::new())
    }

    /// All pairs, in insertion order.
    pub fn into_vec(self) -> Vec<(T, T)> {
        match self {
            Self::One(pair) => vec![pair],
            Self::Other(Some(pairs)) => *pairs,
            Self::Other(None) => Vec::new(),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::rc::Rc;

    use proptest::collection::vec;
    use proptest::prelude::*;

    use super::Slots;

    fn slots(keys: &[u8]) -> Slots<u8> {
        let mut slots = Slots::new();
        for &key in keys {
            put(&mut slots, key, key * 10);
        }
        slots
    }

    fn put(slots: &mut Slots<u8>, key: u8, value: u8) -> Option<(u8, u8)> {
        slots.put(key, value, |each| *each == key)
    }

    fn get(slots: &Slots<u8>, key: u8) -> Option<u8> {
        slots.get(|each| *each == key).copied()
    }

    fn pop(slots: &mut Slots<u8>, key: u8) -> Option<(u8, u8)> {
        slots.pop(|each| *each == key)
    }

    fn keys(slots: &Slots<u8>) -> Vec<u8> {
        slots.iter().map(|(key, _)| *key).collect()
    }

    #[test]
    fn finds_every_key() {
        let slots = slots(&[1, 2, 3, 4, 5, 6]);
        for key in 1..=6 {
            assert_eq!(get(&slots, key), Some(key * 10));
        }
        assert_eq!(get(&slots, 7), None);
        assert_eq!(slots.len(), 6);
    }

    #[test]
    fn replaced_key_keeps_its_position() {
        let mut slots = slots(&[1, 2, 3]);
        assert_eq!(put(&mut slots, 1, 11), Some((1, 10)));
        assert_eq!(put(&mut slots, 2, 22), Some((2, 20)));
        assert_eq!(keys(&slots), [1, 2, 3]);
        assert_eq!(get(&slots, 1), Some(11));
        assert_eq!(get(&slots, 2), Some(22));
    }

    #[test]
    fn removing_a_key_keeps_the_order() {
        let mut slots = slots(&[1, 2, 3, 4]);
        assert_eq!(pop(&mut slots, 1), Some((1, 10)));
        assert_eq!(keys(&slots), [2, 3, 4]);
        assert_eq!(pop(&mut slots, 3), Some((3, 30)));
        assert_eq!(pop(&mut slots, 3), None);
        assert_eq!(put(&mut slots, 1, 12), None);
        assert_eq!(keys(&slots), [2, 4, 1]);
    }

    #[test]
    fn is_empty_after_the_last_key_is_removed() {
        let mut slots = slots(&[1, 2]);
        pop(&mut slots, 1);
        pop(&mut slots, 2);
        assert_eq!(slots.len(), 0);
        assert_eq!(pop(&mut slots, 2), None);
        assert_eq!(put(&mut slots, 5, 50), None);
        assert_eq!(keys(&slots), [5]);
    }

    #[test]
    fn take_returns_all_pairs_in_order() {
        let mut slots = slots(&[3, 1, 2]);
        assert_eq!(keys(&slots.take()), [3, 1, 2]);
        assert_eq!(slots.len(), 0);
        assert_eq!(get(&slots, 3), None);
    }

    #[test]
    fn into_vec_returns_all_pairs_in_order() {
        assert_eq!(slots(&[]).into_vec(), []);
        assert_eq!(slots(&[3]).into_vec(), [(3, 30)]);
        assert_eq!(slots(&[3, 1, 2]).into_vec(), [(3, 30), (1, 10), (2, 20)]);
    }

    #[test]
    fn is_two_words_wide() {
        assert_eq!(size_of::<Slots<Box<u8>>>(), 2 * size_of::<usize>());
    }

    #[derive(Clone, Debug)]
    enum Operation {
        Put(u8, u8),
        Get(u8),
        Pop(u8),
        Clone,
        Take,
        IntoVec,
    }

    fn operation() -> impl Strategy<Value = Operation> {
        let key = 0..6u8;
        prop_oneof![
            4 => (key.clone(), any::<u8>()).prop_map(|(key, value)| Operation::Put(key, value)),
            2 => key.clone().prop_map(Operation::Get),
            2 => key.prop_map(Operation::Pop),
            1 => Just(Operation::Clone),
            1 => Just(Operation::Take),
            1 => Just(Operation::IntoVec),
        ]
    }

    proptest! {
        #![proptest_config(ProptestConfig { cases: 2000, failure_persistence: None, ..ProptestConfig::default() })]

        /// Any sequence of operations has the same results as on a list of pairs.  No key or value is leaked or dropped
        /// twice.
        #[test]
        fn behaves_like_a_list_of_pairs(operations in vec(operation(), 0..40)) {
            type Item = Rc<u8>;
            let mut slots = Slots::<Item>::new();
            let mut list = Vec::<(Item, Item)>::new();
            let plain = |(key, value): &(Item, Item)| (**key, **value);
            for operation in operations {
                match operation {
                    Operation::Put(key, value) => {
                        let pair = (Rc::new(key), Rc::new(value));
                        let found = slots.put(pair.0.clone(), pair.1.clone(), |each| **each == key);
                        let old = match list.iter_mut().find(|(each, _)| **each == key) {
                            Some(old) => Some(std::mem::replace(old, pair)),
                            None => {
                                list.push(pair);
                                None
                            }
                        };
                        prop_assert_eq!(found, old);
                    }
                    Operation::Get(key) => {
                        let expected = list.iter().find(|(each, _)| **each == key).map(|(_, value)| value);
                        prop_assert_eq!(slots.get(|each| **each == key), expected);
                    }
                    Operation::Pop(key) => {
                        let index = list.iter().position(|(each, _)| **each == key);
                        prop_assert_eq!(slots.pop(|each| **each == key), index.map(|index| list.remove(index)));
                    }
                    Operation::Clone => slots = slots.clone(),
                    Operation::Take => {
                        let taken = slots.take();
                        prop_assert!(taken.iter().map(plain).eq(list.drain(..).map(|pair| plain(&pair))));
                    }
                    Operation::IntoVec => {
                        let pairs = slots.take().into_vec();
                        prop_assert_eq!(pairs, std::mem::take(&mut list));
                    }
                }
                prop_assert_eq!(slots.len(), list.len());
                prop_assert!(slots.iter().map(plain).eq(list.iter().map(plain)));
            }
            // Each key and value has one reference in `slots`, and one in `list`.
            prop_assert!(slots.iter().all(|(key, value)| Rc::strong_count(key) == 2 && Rc::strong_count(value) == 2));
            drop(slots);
            prop_assert!(list.iter().all(|(key, value)| Rc::strong_count(key) == 1 && Rc::strong_count(value) == 1));
        }
    }
}
