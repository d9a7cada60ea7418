//! Keyed slots in insertion order, for the one or two keys there mostly are.

/// Pairs of key and value, both a `T`.
///
/// A key is found by a scan: up to sixteen of them that is as fast as a hash map.  One key, the
/// common number, needs no allocation, and all is two words wide.  Whatever is replaced or removed is
/// returned, never dropped here: the caller decides when a destructor may run.
#[derive(Clone)]
pub enum Slots<T> {
    One((T, T)),
    // Boxed, so that it fits beside the null that stands for "not one".
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

    /// The value of the key that `same` knows.
    #[inline(always)]
    pub fn get(&self, same: impl Fn(&T) -> bool) -> Option<&T> {
        match self {
            Self::One((key, value)) => same(key).then_some(value),
            Self::Other(pairs) => pairs.as_ref()?.iter().find(|(key, _)| same(key)).map(|(_, value)| value),
        }
    }

    /// Set the value of `key`, in its place if it has one, else at the end.  Returns the pair that was there.
    pub fn put(&mut self, key: T, value: T, same: impl Fn(&T) -> bool) -> Option<(T, T)> {
        let pair = (key, value);
        if let Some(place) = self.as_mut_slice().iter_mut().find(|(key, _)| same(key)) {
            return Some(std::mem::replace(place, pair));
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

    /// Remove and return the pair of the key that `same` knows.
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

    /// Remove and return everything.
    pub fn take(&mut self) -> Self {
        std::mem::replace(self, Self::new())
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
    fn keeps_the_place_of_a_replaced_key() {
        let mut slots = slots(&[1, 2, 3]);
        assert_eq!(put(&mut slots, 1, 11), Some((1, 10)));
        assert_eq!(put(&mut slots, 2, 22), Some((2, 20)));
        assert_eq!(keys(&slots), [1, 2, 3]);
        assert_eq!(get(&slots, 1), Some(11));
        assert_eq!(get(&slots, 2), Some(22));
    }

    #[test]
    fn keeps_the_order_when_a_key_goes() {
        let mut slots = slots(&[1, 2, 3, 4]);
        assert_eq!(pop(&mut slots, 1), Some((1, 10)));
        assert_eq!(keys(&slots), [2, 3, 4]);
        assert_eq!(pop(&mut slots, 3), Some((3, 30)));
        assert_eq!(pop(&mut slots, 3), None);
        assert_eq!(put(&mut slots, 1, 12), None);
        assert_eq!(keys(&slots), [2, 4, 1]);
    }

    #[test]
    fn is_empty_after_the_last_key() {
        let mut slots = slots(&[1, 2]);
        pop(&mut slots, 1);
        pop(&mut slots, 2);
        assert_eq!(slots.len(), 0);
        assert_eq!(pop(&mut slots, 2), None);
        assert_eq!(put(&mut slots, 5, 50), None);
        assert_eq!(keys(&slots), [5]);
    }

    #[test]
    fn gives_everything_away_in_order() {
        let mut slots = slots(&[3, 1, 2]);
        assert_eq!(keys(&slots.take()), [3, 1, 2]);
        assert_eq!(slots.len(), 0);
        assert_eq!(get(&slots, 3), None);
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
    }

    fn operation() -> impl Strategy<Value = Operation> {
        let key = 0..6u8;
        prop_oneof![
            4 => (key.clone(), any::<u8>()).prop_map(|(key, value)| Operation::Put(key, value)),
            2 => key.clone().prop_map(Operation::Get),
            2 => key.prop_map(Operation::Pop),
            1 => Just(Operation::Clone),
            1 => Just(Operation::Take),
        ]
    }

    proptest! {
        #![proptest_config(ProptestConfig { cases: 2000, failure_persistence: None, ..ProptestConfig::default() })]

        /// Whatever is done, a list of pairs does the same; and nothing that was put in is leaked or dropped twice.
        #[test]
        fn does_what_a_list_of_pairs_does(operations in vec(operation(), 0..40)) {
            type Thing = Rc<u8>;
            let mut slots = Slots::<Thing>::new();
            let mut list = Vec::<(Thing, Thing)>::new();
            let plain = |(key, value): &(Thing, Thing)| (**key, **value);
            for operation in operations {
                match operation {
                    Operation::Put(key, value) => {
                        let pair = (Rc::new(key), Rc::new(value));
                        let found = slots.put(pair.0.clone(), pair.1.clone(), |each| **each == key);
                        let old = match list.iter_mut().find(|(each, _)| **each == key) {
                            Some(place) => Some(std::mem::replace(place, pair)),
                            None => {
                                list.push(pair);
                                None
                            }
                        };
                        prop_assert_eq!(found, old);
                    }
                    Operation::Get(key) => {
                        let there = list.iter().find(|(each, _)| **each == key).map(|(_, value)| value);
                        prop_assert_eq!(slots.get(|each| **each == key), there);
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
                }
                prop_assert_eq!(slots.len(), list.len());
                prop_assert!(slots.iter().map(plain).eq(list.iter().map(plain)));
            }
            // One reference here, one in the list.
            prop_assert!(slots.iter().all(|(key, value)| Rc::strong_count(key) == 2 && Rc::strong_count(value) == 2));
            drop(slots);
            prop_assert!(list.iter().all(|(key, value)| Rc::strong_count(key) == 1 && Rc::strong_count(value) == 1));
        }
    }
}
