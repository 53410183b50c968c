# facts.sh IMAGE TREE: says what an OS image holds, one fact a line, fields apart by
# blanks, the path last. Runs as mapped root in a user and mount namespace of its own.
set -eu
fsck.erofs --extract="$2" --preserve "$1" >/dev/null
cd "$2"
# A name or target with a line break could pass for another fact.
if find . \( -name '*[[:cntrl:]]*' -o -lname '*[[:cntrl:]]*' \) -print | grep -q .; then
  echo "the image has a file name with control characters" >&2
  exit 1
fi
find . -mindepth 1 -printf 'file %y %m %U %G %P\n'
find . -type l -printf 'link %P\ntarget %l\n'
find . -type f -perm /111 -exec sha256sum {} + | sed 's/^\([0-9a-f]*\)  \.\//sum \1 /'
sed 's/^/passwd /' etc/passwd
sed 's/^\([^:]*\):\([^:]*\):.*/shadow \1:\2/' etc/shadow
find . -type f -size -64k -exec grep -lIE -e '-----BEGIN ([A-Z]+ )?PRIVATE KEY( BLOCK)?-----' {} + | sed 's/^\.\//privatekey /' || true
if [ -s etc/machine-id ]; then echo "machineid etc/machine-id"; fi
sed -n 's/^Package: /package /p; s/^Version: /version /p; s/^Status: /status /p' usr/lib/sysimage/dpkg/status
