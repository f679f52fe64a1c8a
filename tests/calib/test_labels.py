"""Labels: what a csv and class folders say, and what they cannot mean is refused."""

from __future__ import annotations

import pytest

from tomexport.calib.labels import class_folders, from_csv
from tomexport.errors import ImageError

NAMES = ("a.jpg", "b.jpg", "in/c.jpg")


def _csv(tmp_path, text):
    path = tmp_path / "labels.csv"
    path.write_text(text)
    return str(path)


def test_indices_by_path_or_file_name(tmp_path):
    found = from_csv(_csv(tmp_path, "path,label\nc.jpg,2\nb.jpg,10\na.jpg,0\n"), NAMES)
    assert found.classes == (0, 10, 2)
    assert found.note == "labels are column 'label' of labels.csv"


def test_a_file_name_that_two_folders_have_is_not_enough(tmp_path):
    path = _csv(tmp_path, "file,class\nx/a.jpg,1\na.jpg,2\n")
    assert from_csv(path, ("x/a.jpg", "y/a.jpg")).classes == (1, None)


def test_names_of_classes_in_sorted_order(tmp_path):
    found = from_csv(_csv(tmp_path, "file,kind\na.jpg,dog\nb.jpg,cat\n"), NAMES)
    assert found.classes == (1, 0, None)
    assert found.note == (
        "labels are column 'kind' of labels.csv, names in sorted order: cat is 0, dog is 1, for "
        "2 of 3 images"
    )


def test_an_empty_entry_is_no_label(tmp_path):
    assert from_csv(_csv(tmp_path, "file,kind\na.jpg,4\nb.jpg,\n"), NAMES).classes == (
        4,
        None,
        None,
    )


def test_the_known_heading_among_several(tmp_path):
    path = _csv(tmp_path, "file,class_index,name,other\na.jpg,4,tench,\nb.jpg,5,shark,9\n")
    assert from_csv(path, NAMES).classes == (4, 5, None)
    assert from_csv(f"{path}:other", NAMES).classes == (None, 9, None)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "has no line of headings"),
        ("file,label\n", "has no line of headings"),
        ("file,file\na.jpg,b\n", "two columns of one heading"),
        ("file,label\na.jpg\n", "Line 2 of .* 1 entries, its headings are 2"),
        ("file,label\nx.jpg,1\n", "has names of the images, such as a.jpg"),
        ("file,one,two\na.jpg,1,2\n", "Which column of"),
        ("file\na.jpg\n", "Which column of"),
        ("file,label\na.jpg,1\na.jpg,2\n", "gives a.jpg two classes, '1' and '2'"),
        ("file,label\na.jpg,1\nb.jpg,two\n", "mixes class indices with words, such as 'two'"),
        ("file,label\na.jpg,\n", "has no class for any"),
        ('file,label\n"a.jpg,1\n', "cannot be read"),
        ("file,label\na.jpg,-1\nb.jpg,2\n", "mixes class indices with words, such as '-1'"),
    ],
)
def test_what_a_csv_cannot_mean_is_refused(tmp_path, text, words):
    with pytest.raises(ImageError, match=words):
        from_csv(_csv(tmp_path, text), NAMES)


def test_columns_and_files_that_are_not_there(tmp_path):
    path = _csv(tmp_path, "file,label\na.jpg,1\n")
    with pytest.raises(ImageError, match="has no column 'kind' of classes; it has label"):
        from_csv(f"{path}:kind", NAMES)
    with pytest.raises(ImageError, match=r"The labels .*absent\.csv cannot be read"):
        from_csv(str(tmp_path / "absent.csv"), NAMES)
    (tmp_path / "labels.csv").write_bytes(b"file,label\na.jpg,\xff\n")
    with pytest.raises(ImageError, match="cannot be read"):
        from_csv(path, NAMES)


def test_folders():
    assert class_folders(("b/1.jpg", "a/x/2.jpg")).classes == (1, 0)
    assert class_folders(("1.jpg", "a/2.jpg")) is None
    assert class_folders(("a/1.jpg", "a/2.jpg")) is None  # one folder tells nothing apart
